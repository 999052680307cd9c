"""python -m benchmarks NAME... [--out DIR] [--quick]"""

import sys

from benchmarks.run import main

sys.exit(main())
