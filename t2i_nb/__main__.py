"`python -m t2i_nb` is `t2i`: every module that has commands, and the function that runs one."
import sys
from t2i_nb import commands, own_images, cloud # noqa: F401, they register their commands
from t2i_nb.cli import main

if __name__ == '__main__': sys.exit(main())
