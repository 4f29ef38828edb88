"""Words that a test looks for."""

import re

# Words that this project used in a sense of its own; the field's terms stand in their place.
COINED = re.compile(
    r"(?<![a-z])(holdout|folds?|knobs?|mend(s|ed|ing)?|crown[a-z]*|reap(s|ed|ing)?|dearer|cheap[a-z]*|patiently|"
    r"hollow|stillborn|begun|strangers?|told|hears?|heard|hearing|spoken|kept back|put back|"
    r"taken for lost|signs? of life|given away|ever less|cannot be had|may round|lay out|lays out|"
    r"laid out|lay_out|judg[a-z]+)(?![a-z])",
    re.IGNORECASE,
)
