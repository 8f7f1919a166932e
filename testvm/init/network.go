package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"mandos-escrow/initrd"
)

// tryNetwork brings up what the kernel command line asks for, shows what the
// drivers say of it, and puts it back.
func tryNetwork(address string) error {
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	line, err := initrd.ParseCmdline(string(text))
	if err != nil {
		return err
	}
	before, err := linkList()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	n := initrd.StartNetwork(ctx, initrd.NetworkOptions{Words: line.Words, Report: func(format string, a ...any) {
		fmt.Printf("testvm: "+format+"\n", a...)
	}})
	for changed := n.Changed(); ; changed = n.Changed() {
		now, err := linkList()
		if err != nil {
			return err
		}
		if strings.Contains(now, address) {
			fmt.Printf("testvm: network is up\n%s", now)
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("%w: only\n%s", ctx.Err(), now)
		}
	}
	for _, pattern := range []string{"/proc/net/vlan/*", "/proc/net/bonding/*"} {
		files, _ := filepath.Glob(pattern)
		for _, file := range files {
			data, err := os.ReadFile(file)
			fmt.Printf("testvm: %s: %v\n%s", file, err, data)
		}
	}
	if err := n.Stop(context.Background()); err != nil {
		return err
	}
	after, err := linkList()
	if err != nil {
		return err
	}
	if after != before {
		return fmt.Errorf("the network is not as it was: before\n%safter\n%s", before, after)
	}
	fmt.Println("testvm: network is as it was")
	return nil
}

// linkList is all links but loopback and a bond that only its driver wants,
// with their flags and addresses.
func linkList() (string, error) {
	links, err := net.Interfaces()
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for _, l := range links {
		if l.Flags&net.FlagLoopback != 0 || l.Name == "bond0" && l.Flags&net.FlagUp == 0 {
			continue
		}
		addresses, err := l.Addrs()
		if err != nil {
			return "", err
		}
		fmt.Fprintln(&text, l.Name, l.HardwareAddr, l.MTU, l.Flags, addresses)
	}
	return text.String(), nil
}
