Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "/work/main/opt_np/__main__.py", line 5, in <module>
    raise SystemExit(main())
                     ^^^^^^
  File "/work/main/opt_np/cli.py", line 31, in main
    return status or 0
           ^^^^^^
UnboundLocalError: cannot access local variable 'status' where it is not associated with a value
