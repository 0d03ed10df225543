// Package userdata holds what a new machine runs to join a cluster, and its tests.
package userdata
