package main

import (
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// The pages under docs/man are made from the commands, by
//
//	go test ./cmd/mandos-escrow -run TestManPages -write-man
//
// mandos-escrow-unlock.8 is written by hand, because that program links no
// command tree.
var writeMan = flag.Bool("write-man", false, "write docs/man instead of comparing with it")

const manFolder = "../../docs/man"

func TestManPages(t *testing.T) {
	pages := manPages(newRoot(&globals{out: io.Discard, err: io.Discard}))
	for name, text := range pages {
		path := filepath.Join(manFolder, name)
		if *writeMan {
			if err := os.MkdirAll(manFolder, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		committed, err := os.ReadFile(path)
		if err != nil || string(committed) != text {
			t.Errorf("%s is not what the commands say (%v): go test ./cmd/mandos-escrow -run TestManPages -write-man", path, err)
		}
	}
	entries, err := os.ReadDir(manFolder)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, made := pages[e.Name()]; !made && e.Name() != "mandos-escrow-unlock.8" {
			t.Errorf("%s belongs to no command", filepath.Join(manFolder, e.Name()))
		}
	}
}

// TestManText holds the writer to what a reader of a page must see.
func TestManText(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"one\ntwo", "one\ntwo\n"},
		{"one\n\ntwo", "one\n.PP\ntwo\n"},
		{"text:\n\n  --flag  its\n          meaning\n\nend", "text:\n.PP\n.EX\n  \\-\\-flag  its\n          meaning\n.EE\n.PP\nend\n"},
		{`.SH 'x' \n`, "\\&.SH 'x' \\en\n"},
		{"'quoted", "\\&'quoted\n"},
	} {
		if got := manText(c.in); got != c.want {
			t.Errorf("manText(%q) = %q, want %q", c.in, got, c.want)
		}
	}
	page := manPages(newRoot(&globals{}))["mandos-escrow-recover.8"]
	for _, want := range []string{
		"mandos\\-escrow\\-recover \\- get back into a volume", ".SH SYNOPSIS", ".SH EXIT STATUS", ".SH EXAMPLES", ".SH FILES",
		"\\-\\-words", ".B 3\n", "mandos\\-escrow recover \\-\\-request \\-\\-volume laptop7",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("mandos-escrow-recover.8 lacks %q", want)
		}
	}
	if strings.Contains(page, "--state") || strings.Contains(page, "\\-\\-state DIR") {
		t.Error("mandos-escrow-recover.8 shows the hidden flag --state")
	}
}

// manPages makes the page of the program and one for each of its commands.
func manPages(root *cobra.Command) map[string]string {
	pages := map[string]string{}
	all := []string{root.Name(), root.Name() + "-unlock"}
	for _, cmd := range root.Commands() {
		if cmd.IsAvailableCommand() {
			all = append(all, root.Name()+"-"+cmd.Name())
		}
	}
	pages[root.Name()+".8"] = manPage(root, all)
	for _, cmd := range root.Commands() {
		if cmd.IsAvailableCommand() {
			pages[root.Name()+"-"+cmd.Name()+".8"] = manPage(cmd, all)
		}
	}
	return pages
}
