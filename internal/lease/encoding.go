package lease

import (
	"bytes"
	"compress/flate"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// A record is the target of a symbolic link. EFS and ext4 take targets of some 4,000 bytes, XFS
// of 1,024.
const (
	goodTarget = 1000 // bytes; what is longer is compressed
	maxTarget  = 4000 // bytes, compressed
	maxDecoded = 1 << 20
	// packedMark begins a compressed target; a plain one is JSON and begins with a brace.
	packedMark = "z:"
	// What a holder says in an Answer must never keep it from renewing.
	maxAnswer, minAnswer = 400, 50 // bytes
)

// encodeRecord returns the target that holds the record: JSON or, if that is long, JSON
// compressed (raw DEFLATE) as base64 (URL alphabet, without padding). Texts of an Answer are
// shortened, the more the longer the rest is.
func encodeRecord(rec Record) (string, error) {
	for n := maxAnswer; ; n /= 2 {
		if rec.Answer != nil {
			rec = rec.Clone()
			rec.Answer.Error, rec.Answer.Hint = clip(rec.Answer.Error, n), clip(rec.Answer.Hint, n/2)
		}
		target, err := encodeTarget(rec)
		if err != nil {
			return "", fmt.Errorf("encode record: %w", err)
		}
		switch {
		case len(target) <= goodTarget:
			return target, nil
		case rec.Answer != nil && n > minAnswer:
		case len(target) <= maxTarget:
			return target, nil
		default:
			return "", fmt.Errorf("encode record: it takes %d bytes, a symbolic link holds %d (are names of instances or hosts very long?)", len(target), maxTarget)
		}
	}
}

func encodeTarget(rec Record) (string, error) {
	b, err := json.Marshal(rec)
	if err != nil || len(b) <= goodTarget {
		return string(b), err
	}
	var z bytes.Buffer
	w, err := flate.NewWriter(&z, flate.BestCompression)
	if err == nil {
		_, err = w.Write(b)
	}
	if err == nil {
		err = w.Close()
	}
	return packedMark + base64.RawURLEncoding.EncodeToString(z.Bytes()), err
}

// clip shortens a text to at most n bytes.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	const more = "..."
	n -= len(more)
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + more
}

// unpack returns the JSON of a target.
func unpack(target string) ([]byte, error) {
	packed, ok := strings.CutPrefix(target, packedMark)
	if !ok {
		return []byte(target), nil
	}
	z, err := base64.RawURLEncoding.DecodeString(packed)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(z)), maxDecoded+1))
	if err == nil && len(b) > maxDecoded {
		err = fmt.Errorf("larger than %d bytes", maxDecoded)
	}
	return b, err
}

// decodeRecord is strict: a compare-and-swap writes the whole record anew, so a field that
// this program does not know would be lost.
func decodeRecord(target string) (Record, error) {
	b, err := unpack(target)
	if err != nil {
		return Record{}, fmt.Errorf("decode record: %w: %w", ErrCorrupt, err)
	}
	var head struct {
		Format int `json:"format"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return Record{}, fmt.Errorf("decode record: %w: %w", ErrCorrupt, err)
	}
	if head.Format != RecordFormat {
		return Record{}, fmt.Errorf("decode record: format %d, this program knows %d (upgrade it): %w", head.Format, RecordFormat, ErrCorrupt)
	}
	var rec Record
	if err := unmarshalStrict(b, &rec); err != nil {
		return Record{}, fmt.Errorf("decode record: %w: %w", ErrCorrupt, err)
	}
	if rec.Version == 0 || rec.Nonce == "" || rec.ClusterID == "" || rec.TTL <= 0 {
		return Record{}, fmt.Errorf("decode record: version, nonce, cluster id or ttl is missing: %w", ErrCorrupt)
	}
	return rec, nil
}

func unmarshalStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if d.More() {
		return errors.New("data after the end")
	}
	return nil
}
