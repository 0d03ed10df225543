package fsx

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestKept(t *testing.T) {
	root := t.TempDir()
	k := &Kept{}
	dir := filepath.Join(root, "d")
	if err := k.Mkdir(dir); err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(dir, "f")
	if _, err := k.Open(p); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("opening what is not there: %v", err)
	}
	if err := CreateWhole(k, p, []byte("one")); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Create(p); !errors.Is(err, fs.ErrExist) {
		t.Errorf("creating twice: %v", err)
	}
	if b, err := ReadFile(k, p, 10); err != nil || string(b) != "one" {
		t.Errorf("read %q, %v", b, err)
	}
	// A directory that was replaced is found again under its name.
	if err := os.Rename(dir, dir+"-old"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir + "-old"); err != nil {
		t.Fatal(err)
	}
	if err := k.Mkdir(dir); err != nil {
		t.Fatal(err)
	}
	if err := CreateWhole(k, p, []byte("two")); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(p); err != nil || string(b) != "two" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := k.Remove(p); err != nil {
		t.Error(err)
	}
	if err := k.Remove(p); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removing twice: %v", err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
	if err := CreateWhole(k, p, nil); err != nil {
		t.Errorf("after Close: %v", err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}

// TestKeptManyDirectories: more directories than handles, used from several goroutines.
func TestKeptManyDirectories(t *testing.T) {
	root := t.TempDir()
	k := &Kept{}
	defer k.Close()
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range keptMost {
				dir := filepath.Join(root, string(rune('a'+g))+"-"+string(rune('0'+i%64))+string(rune('0'+i/64)))
				if err := k.Mkdir(dir); err != nil {
					t.Error(err)
					return
				}
				if err := CreateWhole(k, filepath.Join(dir, "f"), []byte("x")); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := len(k.dirs); n > keptMost {
		t.Errorf("%d directories are open", n)
	}
}
