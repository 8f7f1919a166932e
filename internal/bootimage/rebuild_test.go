package bootimage

import (
	"context"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"
)

func TestApply(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		images := f.mustApply(t)
		if len(images) != 2 {
			t.Fatalf("%+v", images)
		}
		for i, image := range images {
			if image.Kernel != kernels[i] || image.Path != "/boot/initrd.img-"+kernels[i] || image.Mode != 0o600 || image.Err != nil {
				t.Errorf("%+v", image)
			}
		}
		if said := f.said.String(); !strings.Contains(said, "installed ") || !strings.Contains(said, "Generating") && !strings.Contains(said, "Executing") {
			t.Errorf("said only %s", said)
		}
		// again: there is nothing to do
		record, err := f.read("var/lib/mandos-escrow-agent/installed")
		if err != nil || !strings.Contains(string(record), "state: committed") {
			t.Errorf("%s, %v", record, err)
		}
		before := f.tree(t)
		f.goesWrong(t, "fails-at-1")
		f.mustApply(t)
		f.unchanged(t, before)
		inspected, err := f.Inspect(t.Context())
		if err != nil || len(inspected) != 2 || !reflect.DeepEqual(inspected, images) {
			t.Errorf("%+v, %v", inspected, err)
		}
	})
}

// TestRebuildFails: whatever goes wrong, nothing has changed, and it is said.
func TestRebuildFails(t *testing.T) {
	t.Parallel()
	for how, want := range map[string]error{
		"fails-at-1":          ErrRebuild,
		"fails-at-2":          ErrRebuild, // the first kernel has its new image
		"fails-at-1 destroys": ErrRebuild,
		"fails-at-2 destroys": ErrRebuild,
		"skipped":             ErrRebuild, // exit code 0, no new image
		"nothing":             ErrContents,
		"truncated":           ErrContents,
		"program":             ErrContents,
		"stale":               ErrContents,
		"extra":               ErrContents,
		"unstarted":           ErrContents,
		"readable truncated":  ErrContents,
		"running":             ErrForbidden,
		"key":                 ErrForbidden,
		"readable stale":      ErrContents,
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			both(t, func(t *testing.T, f *fake) {
				before := f.tree(t)
				f.goesWrong(t, how)
				_, err := f.Apply(t.Context())
				is(t, err, ErrRebuild, "the machine boots as before, by its prompt", "all` fails", "run this again")
				is(t, err, want)
				if none := strings.Contains(err.Error(), "no new one was made"); none != (how == "skipped" && f.Kind == InitramfsTools) {
					t.Errorf("got %v", err)
				}
				f.unchanged(t, before)
				f.goesWrong(t, "")
				f.mustApply(t)
			})
		})
	}
}

// TestNotEnrolled: without an enrolment nothing is made, and nothing locked.
func TestNotEnrolled(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		if err := os.RemoveAll(f.path("var/lib/mandos-escrow-agent")); err != nil {
			t.Fatal(err)
		}
		before := f.tree(t)
		_, err := f.Inspect(t.Context())
		is(t, err, os.ErrNotExist, "nothing is enrolled below "+f.Root)
		_, err = f.Rebuild(t.Context())
		is(t, err, os.ErrNotExist, "nothing is enrolled")
		f.unchanged(t, before)
	})
}

// TestReadable: an image that others can read is none. dracut's images get their
// mode before they get their name.
func TestReadable(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		f.goesWrong(t, "readable")
		if f.Kind == InitramfsTools {
			_, err := f.Apply(t.Context())
			is(t, err, ErrReadable, "/boot/initrd.img-6.1.0-1", "mode 0644", "umask=0077")
			is(t, err, ErrRebuild)
			f.unchanged(t, before)
		} else {
			f.mustApply(t)
		}
		f.goesWrong(t, "")
		f.mustApply(t)
		if err := os.Chmod(f.path("boot/initrd.img-6.1.0-2"), 0o640); err != nil {
			t.Fatal(err)
		}
		images, err := f.Inspect(t.Context())
		if err != nil || images[0].Err != nil {
			t.Fatalf("%+v, %v", images, err)
		}
		is(t, images[1].Err, ErrReadable, "mode 0640")
	})
}

// TestChangedSince: what was enrolled after an image was made is not in it.
func TestChangedSince(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		f.mustApply(t)
		for _, change := range []struct {
			file, text string
			want       []string
		}{
			{"etc/mandos-escrow/unlock.conf", "another", []string{"its /etc/mandos-escrow/unlock.conf is not the one"}},
			{"etc/mandos-escrow/network-hooks.d/wifi", "#!/bin/sh", []string{"/etc/mandos-escrow/network-hooks.d/wifi is missing"}},
			{"usr/lib/mandos-escrow/mandos-escrow-unlock", "newer", []string{"its /usr/lib/mandos-escrow/mandos-escrow-unlock is not the one"}},
		} {
			if err := os.MkdirAll(f.path("etc/mandos-escrow/network-hooks.d"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(f.path(change.file), []byte(change.text), 0o600); err != nil {
				t.Fatal(err)
			}
			images, err := f.Inspect(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, image := range images {
				is(t, image.Err, ErrContents, change.want...)
			}
		}
		if _, err := f.Rebuild(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestUnenrolled: without an enrolment an image may hold nothing of ours.
func TestUnenrolled(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		f.mustApply(t)
		if err := os.RemoveAll(f.path("etc/mandos-escrow")); err != nil {
			t.Fatal(err)
		}
		images, err := f.Inspect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, image := range images {
			is(t, image.Err, ErrForbidden, "/etc/mandos-escrow")
		}
		if _, err := f.Remove(t.Context()); err != nil {
			t.Fatal(err)
		}
		if images, err = f.Rebuild(t.Context()); err != nil || len(images) != 2 {
			t.Errorf("%+v, %v", images, err)
		}
	})
}

func TestNoRoom(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		for _, full := range []string{"/boot", "/var/lib/mandos-escrow-agent"} {
			f.Free = func(dir string) (int64, error) {
				if f.inside(dir) == full {
					return 1_000_000, nil
				}
				return 1 << 40, nil
			}
			_, err := f.Apply(t.Context())
			is(t, err, ErrRoom, full, "1.0 MB are free", "nothing was changed")
			if full == "/boot" {
				is(t, err, ErrRoom, "initrd.img-6.1.0-1 0.0 MB", "autoremove")
			}
			f.unchanged(t, before)
		}
	})
}

// TestKilled: a run that was killed while the images were made left copies, and
// an image that is half written, or gone.
func TestKilled(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		images, err := f.Images()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Install(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, image := range images {
			if err := f.keep(image); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Remove(f.path(images[0].Path)); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(f.path(images[1].Path), 3); err != nil {
			t.Fatal(err)
		}
		f.goesWrong(t, "fails-at-1")
		_, err = f.Apply(t.Context())
		is(t, err, ErrRebuild)
		f.unchanged(t, before)
		f.goesWrong(t, "")
		f.mustApply(t)
	})
}

// TestInterrupted: whoever ends the program gets the old images back.
func TestInterrupted(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		before := f.tree(t)
		ctx, cancel := context.WithCancel(t.Context())
		f.Run = func(ctx context.Context, root string, c Command) error {
			if err := runFake(ctx, root, c); err != nil {
				return err
			}
			cancel()
			return ctx.Err()
		}
		_, err := f.Apply(ctx)
		is(t, err, ErrRebuild)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		f.unchanged(t, before)
	})
}

// TestNoImage: a kernel without an image is named, and no image at all is none
// to be made.
func TestNoImage(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		if err := os.Remove(f.path("boot/initrd.img-6.1.0-2")); err != nil {
			t.Fatal(err)
		}
		if images := f.mustApply(t); len(images) != 1 {
			t.Errorf("%+v", images)
		}
		images, err := f.Inspect(t.Context())
		if err != nil || len(images) != 2 || images[0].Err != nil {
			t.Fatalf("%+v, %v", images, err)
		}
		is(t, images[1].Err, ErrNoImage, "6.1.0-2")
		if err := os.RemoveAll(f.path("boot")); err != nil {
			t.Fatal(err)
		}
		if images := f.mustApply(t); images != nil || !strings.Contains(f.said.String(), "no boot image yet") {
			t.Errorf("%+v: %s", images, f.said.Bytes())
		}
	})
}

// TestPlaces are those in which dracut and kernel-install put images.
func TestPlaces(t *testing.T) {
	f := newFake(t, Dracut)
	id := "0123456789abcdef0123456789abcdef"
	for _, name := range []string{
		"boot/vmlinuz-7", "boot/initramfs-7.img", "boot/initramfs-7kdump.img", "boot/initramfs-0-rescue-" + id + ".img", "boot/vmlinuz-0-rescue-" + id,
		"boot/" + id + "/8/linux", "boot/" + id + "/8/initrd", "lib/modules/9/vmlinuz", "lib/modules/9/initramfs.img", "lib/modules/8/modules.dep", "lib/modules/7/modules.dep",
		"boot/initrd.img-6.1.0-1.bak", "boot/initrd.img-6.1.0-1.old-dkms",
	} {
		f.write(t, name, "x")
	}
	f.write(t, "etc/machine-id", id+"\n")
	images, err := f.Images()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, image := range images {
		found = append(found, image.Path)
	}
	want := "/boot/initrd.img-6.1.0-1 /boot/initrd.img-6.1.0-2 /boot/initramfs-7.img /boot/" + id + "/8/initrd /lib/modules/9/initramfs.img"
	if got := strings.Join(found, " "); got != want {
		t.Errorf("got %s", got)
	}
	f.mustApply(t)
}

// TestWithout: an image that holds nothing of ours is told so in one line; the
// program that images are compared with may be gone with its package.
func TestWithout(t *testing.T) {
	both(t, func(t *testing.T, f *fake) {
		f.mustApply(t)
		f.write(t, "boot/initrd.img-6.1.0-1", string(make([]byte, 10240))) // an empty archive
		images, err := f.Inspect(t.Context())
		if err != nil || len(images) != 2 || len(images[0].Faults) != 1 || images[1].Err != nil {
			t.Fatalf("%+v, %v", images, err)
		}
		is(t, images[0].Err, ErrWithout, "/boot/initrd.img-6.1.0-1")
		is(t, images[0].Err, ErrContents)
		if err := os.Remove(f.path("usr/lib/mandos-escrow/mandos-escrow-unlock")); err != nil {
			t.Fatal(err)
		}
		_, err = f.Inspect(t.Context())
		is(t, err, ErrNoProgram)
	})
}
