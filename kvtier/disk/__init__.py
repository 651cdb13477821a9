"""The disk tier: objects on NVMe, durable, checked on every read, within a hard limit."""
