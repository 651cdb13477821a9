"""The services of a node: sockets, threads and files around the core; no Ray here."""
