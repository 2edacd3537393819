//go:build !race

package dns

import "time"

// internalLimit is how long a question about a name of the cluster may take in
// the median, whatever the upstreams do.
const internalLimit = 5 * time.Millisecond
