"""Try one case of the campaign, or all of a form or mutation: ``python -m tests.campaign 7/short/subject_edges/3``."""

import sys

from tests.campaign.figures import complaints, describe
from tests.campaign.trials import names, try_case

asked = sys.argv[1]
cases = [asked] if asked.count("/") == 3 else [name for name in names(7, 3, 1) if asked in name]
outcomes = [try_case(name) for name in cases]
print(complaints(outcomes, int(sys.argv[2]) if len(sys.argv) > 2 else 20))
print(describe(outcomes))
if len(cases) == 1:
    print(outcomes[0])
