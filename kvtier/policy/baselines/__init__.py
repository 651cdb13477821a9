"""Well-known cache policies over blocks, to be measured against: none of them knows what a chat is."""
