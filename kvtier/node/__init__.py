"""The sans-I/O core of a node: `NodeCore.handle(now_s, stimulus)` answers what is to be sent to whom.

settings.py       the numbers that the core works with
events.py         stimuli and instructions
blocks.py         the tree of blocks that this node holds anything of
conversations.py  names for chains of blocks
coverage.py       how far a conversation can be restored, and from where
state.py          everything that the node knows, shared by the parts below
counters.py       what it has done since its start
room.py           making room in host memory: evict, spill, wait, or say no
spills.py         what is written to disk ahead of need, or for room
disk_side.py      what is asked of the disk service, and what its answers change
reads.py          reads into host memory that are waited for, from disk or from another node
holding.py        what jobs need all of at once is kept from leaving
parks.py          pool -> host -> disk
plans.py          looking up, choosing, holding
restores.py       disk -> host -> pool
restore_ends.py   what came of a restore, and what is learned from it
cluster_side.py   what is asked of directory and other nodes, and what they ask
elsewhere.py      what other nodes have of a plan's tokens
pulls.py          peer -> host, through peer_reads.py
loans.py          what other nodes read here
announcing.py     what the directory is told
balancing.py      what a full node gives to one with room
graves.py         what was forgotten, here or elsewhere
peers.py          workers and services that come, go and die
admin.py          status, ls, show, models, hint, forget
loads.py          how loaded this node and the others are
locating.py       locate: the nodes, the soonest first token first
core.py           routes each stimulus to the part that handles it
journal.py        the log of all stimuli, and its replay
"""
