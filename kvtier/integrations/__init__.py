"""kvtier inside serving engines. Each module needs its engine installed; the rest of kvtier does not."""
