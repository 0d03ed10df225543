package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// errHeader is a PROXY protocol header that is none, or none of version 2.
var errHeader = errors.New("no PROXY protocol header of version 2")

// signature begins every header of version 2 of the PROXY protocol.
func signature() []byte { return []byte("\r\n\r\n\x00\r\nQUIT\n") }

const (
	headerV2      = 2 << 4
	headerLocal   = 0
	headerProxy   = 1
	headerTCP4    = 0x11
	headerTCP6    = 0x21
	headerFixed   = 16
	maxHeaderRest = 2048 // addresses and whatever a load balancer adds
)

// header is the PROXY protocol's way to say that a connection is from src to dst.
func header(src, dst netip.AddrPort) []byte {
	a, b := src.Addr().Unmap(), dst.Addr().Unmap()
	family := byte(headerTCP4)
	if !a.Is4() || !b.Is4() {
		family = headerTCP6
		a, b = netip.AddrFrom16(a.As16()), netip.AddrFrom16(b.As16())
	}
	out := append(signature(), headerV2|headerProxy, family)
	addresses := append(a.AsSlice(), b.AsSlice()...)
	addresses = binary.BigEndian.AppendUint16(addresses, src.Port())
	addresses = binary.BigEndian.AppendUint16(addresses, dst.Port())
	out = binary.BigEndian.AppendUint16(out, uint16(len(addresses))) //nolint:gosec // 12 or 36
	return append(out, addresses...)
}

// readHeader reads a header and returns the client's address; ok is false where the header
// says that the connection is the load balancer's own.
func readHeader(r io.Reader) (src netip.AddrPort, ok bool, err error) {
	var fixed [headerFixed]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return src, false, fmt.Errorf("read header: %w", err)
	}
	n := int(binary.BigEndian.Uint16(fixed[14:]))
	command := fixed[12] &^ headerV2
	if !bytes.Equal(fixed[:12], signature()) || fixed[12]&0xf0 != headerV2 || command > headerProxy || n > maxHeaderRest {
		return src, false, errHeader
	}
	rest := make([]byte, n)
	if _, err := io.ReadFull(r, rest); err != nil {
		return src, false, fmt.Errorf("read header: %w", err)
	}
	if command == headerLocal {
		return src, false, nil
	}
	size := map[byte]int{headerTCP4: 4, headerTCP6: 16}[fixed[13]]
	if size == 0 || n < 2*size+4 {
		return src, false, errHeader
	}
	a, _ := netip.AddrFromSlice(rest[:size])
	return netip.AddrPortFrom(a.Unmap(), binary.BigEndian.Uint16(rest[2*size:])), true, nil
}
