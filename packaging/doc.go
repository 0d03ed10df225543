// Package packaging holds what puts the agent on a machine (units, images) and its tests.
package packaging
