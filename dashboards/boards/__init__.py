"""The boards, each with the questions of one kind of person.

Every metric they name is in swiftkv.metrics (table or foreign) or in rules.py. Read by: dashboards/write.py, render.py.
"""

from boards.distillation import DISTILLATION
from boards.fleet import FLEET
from boards.pools import POOLS
from boards.tenants import TENANTS
from boards.throughput import THROUGHPUT
from boards.transfer import TRANSFER

BOARDS = (THROUGHPUT, POOLS, TRANSFER, TENANTS, DISTILLATION, FLEET)
