//go:build race

package dns

import "time"

// internalLimit with the race detector, by which the twenty questions that are read
// before take several times as long. It is far below what an upstream is waited for.
const internalLimit = 50 * time.Millisecond
