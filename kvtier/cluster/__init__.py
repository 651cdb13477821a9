"""Ray below the daemon: what starts, places, watches and ends the tier actors. Only this room imports Ray."""
