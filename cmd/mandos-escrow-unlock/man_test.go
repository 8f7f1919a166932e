package main

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestManPage holds the hand-written page to the program: every flag of the
// help, and every exit code, stands in it, and no others.
func TestManPage(t *testing.T) {
	data, err := os.ReadFile("../../docs/man/mandos-escrow-unlock.8")
	if err != nil {
		t.Fatal(err)
	}
	page := strings.ReplaceAll(string(data), `\-`, "-")
	flag := regexp.MustCompile(`--[a-z]+(-[a-z]+)*`)
	options := section(page, "OPTIONS")
	for _, name := range flag.FindAllString(usage, -1) {
		if !strings.Contains(options, name) {
			t.Errorf("the page lacks the flag %s", name)
		}
	}
	for _, name := range flag.FindAllString(page, -1) {
		if !strings.Contains(usage, name) && name != "--key-file" { // cryptsetup's
			t.Errorf("the page has %s, which is no flag", name)
		}
	}
	var codes []string
	for _, m := range regexp.MustCompile(`(?m)^\.B (\d)$`).FindAllStringSubmatch(section(page, "EXIT STATUS"), -1) {
		codes = append(codes, m[1])
	}
	want := fmt.Sprint([]int{exitDone, exitFailed, exitUsage, exitMismatch, exitIntegrity, exitRefused})
	if got := fmt.Sprint(codes); got != want {
		t.Errorf("exit codes of the page %s, of the program %s", got, want)
	}
}

func section(page, name string) string {
	_, text, _ := strings.Cut(page, ".SH "+name+"\n")
	text, _, _ = strings.Cut(text, "\n.SH ")
	return text
}
