package wire

import (
	"fmt"

	"github.com/weftnet/weft"
	"github.com/weftnet/weft/orchestrator/ca"
)

// Names of the services on the wire; never changed.
const (
	controlService    = "weft.Control"
	dispatcherService = "weft.Dispatcher"
	membershipService = "weft.Membership"
	agentService      = "weft.Agent"
)

// mayCall is the whole table of who may call what; the role is that of the
// caller's certificate. What is not in it is forbidden.
func mayCall(method string, caller ca.Identity) error {
	service, name := splitMethod(method)
	managersOnly := false
	switch service {
	case controlService, dispatcherService: // every member
	case membershipService:
		managersOnly = name == "Admit" // forwarded by managers; joiners come by weft-join
	case agentService:
		managersOnly = name != "Drain" && name != "Arrive" // of the caller's own tasks
	default:
		return fmt.Errorf("call %s: unknown service: %w", method, weft.ErrForbidden)
	}
	if managersOnly && caller.Role != weft.RoleManager {
		return fmt.Errorf("call %s: node %s is a worker, only managers may: %w", method, caller.Node, weft.ErrForbidden)
	}
	return nil
}

// splitMethod cuts "/service/name".
func splitMethod(method string) (service, name string) {
	for i := len(method) - 1; i > 0; i-- {
		if method[i] == '/' {
			return method[1:i], method[i+1:]
		}
	}
	return "", ""
}
