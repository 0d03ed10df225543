package workload

import (
	"fmt"
	"strconv"
)

func mariadb() Engine {
	return Engine{
		Name: "mariadb", Image: "dbsupervisor/mariadb:10", Port: 3306,
		Env: "MARIADB_ROOT_PASSWORD=%s", Password: "MYSQL_PWD",
		Client: func(port int) []string {
			return []string{"mariadb", "-h", "127.0.0.1", "-P", strconv.Itoa(port), "-u", "root", "-N", "-B", "--unbuffered", "--force"}
		},
		Setup: "create database shop; create table shop.acked (n bigint primary key) engine=InnoDB;\n",
		Write: func(n int64) string {
			return fmt.Sprintf("insert into shop.acked values (%d); select 'stored', n from shop.acked where n = %d;\n", n, n)
		},
		Acked:    func(line string, n int64) bool { return line == fmt.Sprintf("stored\t%d", n) },
		Read:     "select n from shop.acked;\n",
		DataPath: "/var/lib/mysql",
		// The server's own recovery comes first, as after any kill; then every table, and with the
		// server stopped every page.
		Check: `mariadbd --user=mysql --skip-networking --socket=/tmp/s --pid-file=/tmp/p >/tmp/log 2>&1 & server=$!
until mariadb -S /tmp/s -u root -e 'select 1' >/dev/null 2>&1; do kill -0 $server || { tail /tmp/log; exit 1; }; sleep 0.1; done
mariadb-check -S /tmp/s -u root --all-databases --extended >/tmp/tables
if grep -vE 'OK$|storage engine for the table does.*support check' /tmp/tables; then exit 1; fi
mariadb-admin -S /tmp/s -u root shutdown
wait $server
find . -name '*.ibd' | while read -r f; do innochecksum "$f" || { echo "$f"; exit 1; }; done
# Pages 64 to 191 are the doublewrite buffer, other files' pages: innochecksum calls them invalid
# in a database that was never copied, too.
innochecksum -e 63 ibdata1
innochecksum -s 192 ibdata1
echo "$(wc -l </tmp/tables) tables, $(find . -name '*.ibd' | wc -l) files"`,
		Damage: "shop/acked.ibd", DamageAt: 3*16384 + 200, DamageBytes: 2000,
		Undo: func(int) string {
			return "set global read_only = 0;\ngrant all on *.* to root@'%';\nupdate mysql.global_priv set Priv = json_set(Priv, '$.access', -1);\nflush privileges;\ncreate table shop.m (n int) engine=MEMORY;\n"
		},
	}
}
