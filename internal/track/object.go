package track

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"

	"github.com/cilium/ebpf"
)

// One object serves all little-endian processors: the programs take their arguments from
// BTF-described arrays, not from registers.
//
//go:generate bash bpf/build.sh
//go:embed bpf/track.o
var object []byte

func objectHash() string {
	sum := sha256.Sum256(object)
	return hex.EncodeToString(sum[:])
}

func loadObject() (*ebpf.CollectionSpec, error) {
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the tracking programs: %w", err)
	}
	return spec, nil
}
