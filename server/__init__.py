"""The server: NBD exports from backends. The listener and the device are the sans-I/O twins of connecter and client.

::

    listener    negotiates            haggling    option number -> answer       offers      what may be chosen
    device      runs a connection     serving     command number -> entry       states      a sentence per state
    backends/   where bytes are kept
"""
