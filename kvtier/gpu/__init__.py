"""Engine memory: how KV lies in it, and the engines that copy it to and from slots."""
