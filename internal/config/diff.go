package config

import "reflect"

// Diff names the keys whose values differ, sorted as in the file's documentation. It shows
// no values. Lists and maps count as one key.
func Diff(a, b *Config) []string {
	return diff(reflect.ValueOf(*a), reflect.ValueOf(*b), "")
}

func diff(a, b reflect.Value, prefix string) []string {
	var out []string
	t := a.Type()
	for i := range t.NumField() {
		f := t.Field(i)
		if !f.IsExported() {
			continue
		}
		key := prefix + yamlName(f)
		if f.Type.Kind() == reflect.Struct {
			out = append(out, diff(a.Field(i), b.Field(i), key+".")...)
			continue
		}
		if !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			out = append(out, key)
		}
	}
	return out
}
