package workload

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

func firebird() Engine {
	return Engine{
		Name: "firebird", Image: "dbsupervisor/firebird:3", Port: 3050,
		Env: "FIREBIRD_ROOT_PASSWORD=%s\nFIREBIRD_DATABASE=shop.fdb", Password: "ISC_PASSWORD",
		Client: func(port int) []string {
			return []string{"stdbuf", "-oL", "isql-fb", "-q", "-user", "SYSDBA", "127.0.0.1/" + strconv.Itoa(port) + ":/var/lib/firebird/data/shop.fdb"}
		},
		Setup: "create table acked (n bigint not null primary key);\ncommit;\n",
		Write: func(n int64) string {
			return fmt.Sprintf("set heading off;\ninsert into acked values (%d);\ncommit;\nselect 'stored', n from acked where n = %d;\n", n, n)
		},
		Acked: func(line string, n int64) bool {
			return slices.Equal(strings.Fields(line), []string{"stored", strconv.FormatInt(n, 10)})
		},
		Read:     "set heading off;\nselect n from acked;\n",
		DataPath: "/var/lib/firebird/data",
		// Pages that were allocated and not yet used when the database was killed are lost room, which
		// gfix reports as warnings; anything else is an error.
		Check: `export ISC_USER=SYSDBA
for db in shop.fdb security3.fdb; do
  setpriv --reuid=firebird --regid=firebird --init-groups gfix -v -full "$PWD/$db" >/tmp/said 2>&1 || { cat /tmp/said; exit 1; }
  if grep -vE '^ *$|Summary of validation errors|page warnings' /tmp/said; then exit 1; fi
done
echo "$(stat -c %s shop.fdb) bytes"`,
		Damage: "shop.fdb", DamageAt: 60 * 8192, DamageBytes: 20 * 8192,
		Undo: func(port int) string {
			at := fmt.Sprintf("127.0.0.1/%d:", port)
			return "shell gfix -mode read_write -user SYSDBA " + at + "/var/lib/firebird/data/shop.fdb 2>&1;\n" +
				"shell fbsvcmgr " + at + "service_mgr user SYSDBA action_properties prp_am_readwrite dbname /var/lib/firebird/data/shop.fdb 2>&1;\n" +
				"drop table acked;\ncommit;\n"
		},
	}
}
