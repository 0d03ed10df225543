package config

import _ "embed"

//go:embed example.yaml
var example string

// Example is the commented example configuration, which loads as it stands once the
// share's directory exists.
func Example() string { return example }
