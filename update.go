package weft

import "math"

// Validate refuses what no update can be, by the path of the field below at,
// which is UpdateConfig or RollbackConfig.
func (u *UpdateConfig) Validate(at string) error {
	switch {
	case u.Delay < 0:
		return invalid(at+".Delay", "must not be negative")
	case u.Monitor < 0:
		return invalid(at+".Monitor", "must not be negative")
	case at == FieldRollback && u.OnFailure > UpdateContinue:
		return invalid(at+".FailureAction", "must be pause or continue: what fails on the way back is not rolled back again")
	case u.OnFailure > UpdateRollback:
		return invalid(at+".FailureAction", "must be pause, continue or rollback")
	case math.IsNaN(u.MaxFailureRatio) || u.MaxFailureRatio < 0 || u.MaxFailureRatio > 1:
		return invalid(at+".MaxFailureRatio", "%v: write a number from 0 to 1", u.MaxFailureRatio)
	}
	return nil
}

// Names of the two fields, Docker Engine API v1.47 ServiceSpec.
const (
	FieldUpdate   = "UpdateConfig"
	FieldRollback = "RollbackConfig"
)

// Policy is what bounds the replacing of tasks in a state of the service.
func (s *ServiceSpec) Policy(in UpdateState) UpdateConfig {
	switch {
	case in != RollbackRunning && in != RollbackPaused:
		return s.Update
	case s.Rollback == (UpdateConfig{}): // stored by a version that knew none
		return DefaultUpdate
	}
	return s.Rollback
}

// Tolerates reports whether an update goes on after failed of all places have had
// a new task that failed.
func (u *UpdateConfig) Tolerates(failed, all int) bool {
	return failed == 0 || u.OnFailure == UpdateContinue || float64(failed) <= u.MaxFailureRatio*float64(all)
}
