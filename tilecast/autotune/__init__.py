"""From a plan to decisions: candidates, measuring, selecting."""
