package vxlan

import "testing"

// A new kind of operation must say which object it works on, or its repairs
// would panic in production.
func TestEveryOperationIsClassed(t *testing.T) {
	for k := range OpKind(len(opNames)) {
		op := Op{Kind: k, VNI: 4097, Port: &Port{}, HostLeg: &HostLeg{Name: "leg"}, Network: &Network{}}
		if o := objectOf(op); o.words(op) == "" || int(o.class) >= len(classNames) {
			t.Errorf("%s: %+v", k, o)
		}
	}
}
