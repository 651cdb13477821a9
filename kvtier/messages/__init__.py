"""What clients, services and nodes say to each other, and how it travels."""
