package sync

// BaseTree is the tree that captures are differences against, for WriteRequest.Base; nil if
// there is no snapshot yet or no baseline. It must not be changed.
func (v *Volume) BaseTree() *Tree {
	v.op.Lock()
	defer v.op.Unlock()
	if v.base == nil || v.base.Ref.ID == "" {
		return nil
	}
	return v.base
}

// Tier says how changes are found: "hashed" reads what stat shows as touched and compares
// the hashes of its blocks.
func (v *Volume) Tier() string { return "hashed" }
