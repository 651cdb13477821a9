"""KV from one node to another: TCP straight between the nodes' host memory."""
