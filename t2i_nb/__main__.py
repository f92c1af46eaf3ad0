"`python -m t2i_nb` is the command `t2i`."
from t2i_nb.cli import main

if __name__ == '__main__': raise SystemExit(main())
