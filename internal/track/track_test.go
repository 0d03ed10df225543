package track

import (
	"os"
	"slices"
	"testing"
)

func TestBufferedWrites(t *testing.T) {
	eachFS(t, func(t *testing.T, v *volume) {
		must(t, os.WriteFile(v.path("f"), make([]byte, 4<<20), 0o644))
		tr := v.opened(t)
		byOther(t, `printf x | dd of="$1" bs=1 seek=1000000 conv=notrunc 2>/dev/null
			dd if=/dev/urandom of="$1" bs=8192 count=300 seek=100 conv=notrunc 2>/dev/null`, v.path("f"))
		c := whole(t, drain(t, tr))
		n := c.Inodes[v.ino(t, "f")]
		if n == nil {
			t.Fatalf("the file is not reported: %+v", c.Inodes)
		}
		want := []Range{{819200, 3276800}}
		if !slices.Equal(n.Written, want) {
			t.Errorf("written %v, want %v", n.Written, want)
		}
		if n.Ranged {
			t.Error("ranged")
		}
		c = whole(t, drain(t, tr))
		if len(c.Inodes) != 0 || len(c.Names) != 0 {
			t.Errorf("nothing happened, and is reported: %+v %v", c.Inodes, c.Names)
		}
	})
}
