"""Compare the gateway with what one would use otherwise: ``python loadtests/compare.py``, in the project's folder.

``loadtests/README.md`` says what is measured and how to read the report; the package ``comparison`` beside it does it.
"""

import cyclopts
from comparison.command import main

if __name__ == "__main__":
    cyclopts.run(main)
