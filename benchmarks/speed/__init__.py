"""How fast: videos per hour, scaling, a step's parts, recovery, and a device's constants."""
