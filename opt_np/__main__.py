"""python -m opt_np: the same as opt-np."""

from opt_np.cli import main

raise SystemExit(main())
