package reconcile

import "github.com/weftnet/weft"

// NeedsRestart is weft.NeedsRestart: the API asks the same question.
func NeedsRestart(old, new *weft.ServiceSpec) bool { return weft.NeedsRestart(old, new) }
