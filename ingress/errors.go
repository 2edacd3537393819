package ingress

import "fmt"

// NetworkError is an error of Apply that concerns one network alone: tasks on
// the others may go on. An error of Apply that is none of these, and joins none,
// concerns everything.
type NetworkError struct {
	VNI uint32
	Err error
}

// Error implements error.
func (e *NetworkError) Error() string { return fmt.Sprintf("vni %d: %v", e.VNI, e.Err) }

// Unwrap gives the cause.
func (e *NetworkError) Unwrap() error { return e.Err }

// FailedNetwork is the VNI of the network that the error concerns. Whoever
// joins the errors of several networks finds them by this method.
func (e *NetworkError) FailedNetwork() uint32 { return e.VNI }
