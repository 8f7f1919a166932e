package testvm

import (
	"slices"
	"testing"
)

func TestResolveModules(t *testing.T) {
	const dep = `kernel/fs/dm-crypt.ko.xz: kernel/md/dm-mod.ko.xz
kernel/md/dm-mod.ko.xz:
kernel/virtio/virtio_blk.ko: kernel/virtio/virtio.ko kernel/virtio/virtio_ring.ko
kernel/virtio/virtio.ko: kernel/virtio/virtio_ring.ko
kernel/virtio/virtio_ring.ko:
`
	const builtin = "kernel/fs/ext4/ext4.ko\nkernel/crypto/crc32c-generic.ko\n"
	for _, test := range []struct {
		name  string
		names []string
		want  []string
	}{
		{"what is needed comes first, once", []string{"virtio_blk", "virtio"}, []string{
			"kernel/virtio/virtio_ring.ko", "kernel/virtio/virtio.ko", "kernel/virtio/virtio_blk.ko",
		}},
		{"hyphen and underscore are one", []string{"dm_crypt"}, []string{
			"kernel/md/dm-mod.ko.xz", "kernel/fs/dm-crypt.ko.xz",
		}},
		{"built in needs nothing", []string{"ext4", "crc32c_generic"}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := resolveModules(dep, builtin, test.names)
			if err != nil || !slices.Equal(got, test.want) {
				t.Errorf("got %v, %v; want %v", got, err, test.want)
			}
		})
	}
	if got, err := resolveModules(dep, builtin, []string{"virtio_net"}); err == nil {
		t.Errorf("an unknown module gave %v", got)
	}
}

func TestKernelDepends(t *testing.T) {
	const depends = "kmod, linux-base (>= 4.3~), linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), linux-modules-6.8.0-31-generic, linux-image-extra"
	want := []string{"linux-image-6.1.0-56-cloud-amd64", "linux-modules-6.8.0-31-generic"}
	if got := kernelDepends(depends); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
