package enroll

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"mandos-escrow/internal/config"
	"mandos-escrow/luks"
	"mandos-escrow/unlock"
)

func (e *enrolment) configPath() string { return e.path(BootFolder, unlock.ConfigFile) }

// readBootConfig returns an empty configuration when there is none.
func (e *enrolment) readBootConfig() (*unlock.Config, error) {
	data, err := os.ReadFile(e.configPath())
	if errors.Is(err, fs.ErrNotExist) {
		return &unlock.Config{}, nil
	}
	if err != nil {
		return nil, err
	}
	conf, err := unlock.ParseConfig(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", e.configPath(), err)
	}
	return conf, nil
}

// bootConfig returns unlock.conf with the volumes that it has, and with the
// given ones as they are now, or without them. It is nil when none is left.
func (e *enrolment) bootConfig(boot bool, volumes ...*volume) ([]byte, error) {
	before, err := e.readBootConfig()
	if err != nil {
		return nil, err
	}
	conf := &unlock.Config{Machine: e.boot.Key.KeyID(), Threshold: e.Token.BootThreshold(), Servers: e.servers(), Volumes: before.Volumes}
	for _, v := range volumes {
		pins := v.header.Enrolled()
		i := slices.IndexFunc(conf.Volumes, func(o unlock.Volume) bool { return o.UUID == pins.UUID })
		switch {
		case boot && i < 0:
			conf.Volumes = append(conf.Volumes, bootVolume(v.path, pins))
		case boot: // in its place: where nothing else changed, the file stays the same
			conf.Volumes[i] = bootVolume(v.path, pins)
		case i >= 0:
			conf.Volumes = slices.Delete(conf.Volumes, i, i+1)
		}
	}
	if len(conf.Volumes) == 0 {
		return nil, nil
	}
	return conf.Bytes()
}

func bootVolume(path string, pins luks.Enrolled) unlock.Volume {
	return unlock.Volume{
		UUID: pins.UUID, Path: path, Type: pins.Type, Cipher: pins.Cipher, KeyBits: pins.KeyBits,
		Offset: pins.Offset, SectorSize: pins.SectorSize, Digest: pins.Digest,
	}
}

// checkBootConfig sees to it that the file can be written when it comes to
// that, when keyslots have been added already.
func (e *enrolment) checkBootConfig() error {
	if _, err := e.bootConfig(!e.NoBoot, e.volumes...); err != nil {
		return fmt.Errorf("%s could not be written: %w", e.configPath(), err)
	}
	return nil
}

func (e *enrolment) writeBootConfig(boot bool, v *volume) error {
	data, err := e.bootConfig(boot, v)
	if err != nil {
		return err
	}
	if data == nil {
		return config.Remove(e.configPath())
	}
	return config.Replace(e.configPath(), data)
}
