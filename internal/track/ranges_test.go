package track

import (
	"reflect"
	"testing"
)

func TestRanges(t *testing.T) {
	all := bitmap{^uint64(0), ^uint64(0)}
	for _, test := range []struct {
		name   string
		chunks []chunk
		want   []Range
	}{
		{"nothing", nil, nil},
		{"first and last block", []chunk{{n: 0, written: bitmap{1, 1 << 63}}}, []Range{{0, 8192}, {127 << 13, 1 << 20}}},
		{"over both words and the next chunk", []chunk{{n: 2, written: bitmap{1, 0}}, {n: 1, written: all}}, []Range{{1 << 20, 2<<20 + 8192}}},
		{"the same twice", []chunk{{n: 5, written: bitmap{2, 0}}, {n: 5, written: bitmap{4, 0}}}, []Range{{5<<20 + 8192, 5<<20 + 3<<13}}},
		{"at 16 TiB", []chunk{{n: 1<<24 - 1, written: bitmap{0, 1 << 63}}}, []Range{{1<<44 - 8192, 1 << 44}}},
	} {
		got := files{7: {chunks: test.chunks}}.ranges()[7].Written
		if !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s: %v, want %v", test.name, got, test.want)
		}
	}
}
