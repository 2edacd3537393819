package vxlan

// NetworkError is an error that concerns one network only: the others are as
// wanted. Kernel.Apply joins one per failed operation.
type NetworkError struct {
	VNI uint32
	Err error
}

// Error is that of the cause, which names the network already.
func (e *NetworkError) Error() string { return e.Err.Error() }

// Unwrap gives the cause.
func (e *NetworkError) Unwrap() error { return e.Err }

// FailedNetwork is the VNI of the network that the error concerns. Whoever
// waits for another network need not wait for this one.
func (e *NetworkError) FailedNetwork() uint32 { return e.VNI }
