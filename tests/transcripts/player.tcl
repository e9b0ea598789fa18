# Plays the client's part with the Tcl package: a command a line on stdin, what `request` makes of its reply on
# stdout, with an error put back into the sentence that the broker sent.

package require compute_broker

while {[gets stdin command] >= 0} {
    if {[catch {compute_broker::request $command} reply options]} {
        set code [lindex [dict get $options -errorcode] 1]
        set reply "ERROR: $reply"
        if {$code ni {UNKNOWN_COMMAND WORKER_NOT_FOUND ERROR}} {append reply " \[$code\]"}
    }
    puts $reply
    flush stdout
}
