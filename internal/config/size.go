package config

import (
	"fmt"
	"math"

	"github.com/dustin/go-humanize"
)

// ParseSize reads "64MiB" (binary), "64MB" (decimal) or a plain number of bytes.
func ParseSize(s string) (Size, error) {
	n, err := humanize.ParseBytes(s)
	if err != nil || n > math.MaxInt64 {
		return 0, fmt.Errorf("parse size %q: not a number of bytes", s)
	}
	return Size(n), nil
}

// String shows a size as people write it.
func (s Size) String() string {
	if s < 0 {
		return fmt.Sprintf("%d B", int64(s))
	}
	return humanize.IBytes(uint64(s))
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	v, err := ParseSize(string(b))
	*s = v
	return err
}
