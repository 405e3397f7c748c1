"""The sans-I/O NBD core: bytes in, events out, both sides of the protocol. No I/O, clock or ring here.

::

    connecter   negotiates            options     option number -> handler       wire_options  handshake bytes
    client      runs a connection     commands    command number -> entry        wire          transmission bytes
    receiver    its receiving half    replies     chunk type -> kind             constants     every number
    events      what it reports       states      a sentence per state           uri           where a server is
    requests    what may be queued    refusals    what a refusal means           export        what was negotiated
    sinks       where payload goes    extents     block status
"""
