"""`kvtier demo`: conversations on a small model, a daemon killed between turns, every bit compared."""
