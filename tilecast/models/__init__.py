"""Model configs to expert layers: families, presets, layer specs and sharding arithmetic."""
