//! Messages under fake time.
