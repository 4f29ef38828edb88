"""What is done with recorded runs: reproduced, compared, reported."""
