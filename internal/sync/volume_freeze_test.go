package sync

import "testing"

// TestReaderArena: what doesn't fit is read all the same, and the memory is given back.
func TestReaderArena(t *testing.T) {
	a := newArena(3 * BlockSize)
	if a == nil {
		t.Fatal("no memory")
	}
	if len(a.take(2*BlockSize)) != 2*BlockSize || a.take(2*BlockSize) != nil {
		t.Fatal("an arena of three blocks has two and not two more")
	}
	a.free()
	a.free()
	if a.take(BlockSize) != nil {
		t.Fatal("memory that was given back")
	}
	var none *arena
	if none.take(1) != nil {
		t.Fatal("memory of no arena")
	}
	none.free()
}
